"""What a machine with one GPU can check and time in one command of at most eight minutes: `python -m benchmarks.gpu`.

It needs torch and Triton, nothing else; training needs what the trainer needs, a peer its package. Sections are
processes with a time limit, in an order that brings first what says most. Every figure is a line of check.jsonl from
the moment that it is known, so that no crash and no kill takes it away; check.json and check.md are made of the lines.
"""
