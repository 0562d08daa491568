"""Fine-tune a model with QLoRA: accelerate launch train/sft.py CONFIG; alone it is ``halfbyte train``."""

from halfbyte.command_line import run_script

if __name__ == "__main__":
    run_script("train")
