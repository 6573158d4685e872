"""`python -m peft_reft` is `peft-reft`."""

from peft_reft_cli import main


main()
