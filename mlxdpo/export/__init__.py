"""From a run to what others load: adapters, fused weights, GGUF; finished only when it was reloaded and measured."""

from mlxdpo.export.record import RECORD, Exported, Fidelity, Target, read_record

__all__ = ["RECORD", "Exported", "Fidelity", "Target", "read_record"]
