# SPDX-License-Identifier: Apache-2.0
"""What a model makes of long text.

tasks           retrieval, tracking and counting tasks, by name
ruler           RULER's thirteen tasks, case for case, and its figures
cases           haystacks and questions of an exact token length
scoring         cases scored by one forward pass, without generation
perplexity      sliding-window perplexity by context length and position
huggingface     a Hugging Face folder to score
megatron        a Megatron checkpoint to score, over tensor, pipeline and context ranks
run             one evaluation, written case by case
compare         several runs in one table and picture
pictures        heat maps, lines by length and place
lm_eval         a model class for lm-eval
"""
