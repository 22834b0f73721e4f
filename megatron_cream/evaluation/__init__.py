# SPDX-License-Identifier: Apache-2.0
"""Evaluates models on long text.

evaluate          the command, and ``evaluate()``; its flags are evaluation_settings, validated
hf_model          a Hugging Face folder as a model to score with; generation decodes with it
megatron_model    a Megatron checkpoint as one, on any layout
forward           one forward pass over a context and the tails that continue it
other_rope        another RoPE than a model's own; long_attention, another attention
prompts           tokenizer, chat template, and cases of an exact token length
evaluation_tasks  retrieval, tracking and counting tasks by name, and their published cases
task_texts        what the haystacks of these tasks read, and what is asked about them
scoring           cases scored by one forward pass, without generation; their shares
perplexity        by context length and position: a sliding window, or one of each document
longppl           LongPPL: perplexity of the tokens that only a long context tells
ruler             RULER's thirteen tasks, case for case, answered greedily; its figures
results           95 % intervals and tables; store keeps results, result_files reads them
pictures          pictures of results, by charts
results_page      finished runs compared, in one page, or in a model card
while_training    figures of a model while it trains, through Megatron's own schedule
lm_eval           a model class for lm-eval; benchmark_files makes tasks of local files
conversation      the command ``megatron-cream chat``
"""
