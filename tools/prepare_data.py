"""Prepare text for training: tokenizer, Megatron .bin/.idx sets, a train/validation split."""

import sys

from atlas_megatron.cli.ending import say_interrupts

if __name__ == "__main__":
    say_interrupts("prepare_data")  # before the imports that take seconds
    from atlas_megatron.commands.prepare_data import main

    sys.exit(main())
