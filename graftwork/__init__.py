"""graftwork: declarative PEFT experiment recipes over megatron-core, in the NeMo Run style."""

__version__ = "0.1.0"
