from support import ranks
def test_async(tmp_path, flags):
    more=["--save",str(tmp_path/"o"),"--load",str(tmp_path/"o"),"--save-interval","2","--async-save","--use-persistent-ckpt-worker","--async-strategy","mcore","--exit-signal-handler","--eval-iters","0","--manual-gc","--manual-gc-interval","100","--cross-entropy-loss-fusion","--cross-entropy-fusion-impl","native"]
    r=ranks.train(tmp_path/"a",[*flags,*more,"--exit-interval","4"],ranks=2)
    print("\n".join(r.lines("checkpoint")), r.status, r.losses)
    r2=ranks.train(tmp_path/"b",[*flags,*more],ranks=2)
    print("\n".join(r2.lines("checkpoint")), r2.losses)
    print((tmp_path/"o"/"latest_checkpointed_iteration.txt").read_text())
