"""From a run to what others load: adapters, fused weights, GGUF; finished only when it was reloaded and measured.

An exporter is one entry of `EXPORTERS`: what it refuses, how it writes, how its artefact is loaded back.
"""

from mlxdpo.exporters.record import RECORD, Exported, Fidelity, Target, read_record
from mlxdpo.exporters.run import EXPORTERS, export

__all__ = ["EXPORTERS", "RECORD", "Exported", "Fidelity", "Target", "export", "read_record"]
