"""`python -m peft_reft_cli` is `peft-reft`, without the import of peft_reft that `python -m peft_reft` begins with."""

from . import main


main()
