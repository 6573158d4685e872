"""Adapters to training frameworks, one folder each. Installed as peft_reft.integrations."""
