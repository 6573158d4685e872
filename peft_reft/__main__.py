"""`python -m peft_reft` is `peft-reft`."""

from .cli import main


main()
