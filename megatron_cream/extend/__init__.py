# SPDX-License-Identifier: Apache-2.0
"""Extends a model in one command: Hugging Face folder in, longer Hugging Face folder out.

extend       the command, its settings, and the order of its steps
recipe       what is trained, on what layout: numbers that follow from model, target and machine
steps        one step: a command of its own, its log, its progress bar
html_report  what the model could do before and can do after, as one HTML file
"""
