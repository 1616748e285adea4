"""Fine-tune an exported Hugging Face model on long texts, on one process or with DeepSpeed's ZeRO on many."""

import sys

from atlas_megatron.cli.ending import say_interrupts

if __name__ == "__main__":
    say_interrupts("finetune")  # before the imports that take seconds
    from atlas_megatron.commands.finetune import main

    sys.exit(main())
