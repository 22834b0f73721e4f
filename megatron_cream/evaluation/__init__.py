# SPDX-License-Identifier: Apache-2.0
"""Evaluates models on long text.

evaluate    the command, and ``evaluate()``; its flags are evaluation_settings, validated
other_rope  another RoPE than a model's own, where the flags ask for one
prompts     the tokenizer, and what a prompt puts around a task
forward     one forward pass over a context and the tails that continue it
evaluation_tasks  retrieval, tracking and counting tasks, by name
haystacks   cases of an exact token length
scoring     cases scored by one forward pass, without generation
perplexity  perplexity by context length and position: a sliding window, or one of each document
longppl     LongPPL: perplexity of the tokens that only a long context tells, its key_tokens
results     shares, perplexities, intervals and tables; store keeps them, result_files reads them
compare     several runs in one table and picture
report      finished runs in one page (html_page), or in a model card
ruler       RULER's thirteen tasks, case for case; a model answers them greedily; its figures
generation  greedy decoding by a Hugging Face model
lm_eval     a model class for lm-eval
"""
