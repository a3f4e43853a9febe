"""MLflow."""

from dataclasses import dataclass, field

from dpt.config.numbers import NOT_NEGATIVE
from dpt.config.sections.checking import check, check_fields


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """The MLflow record of runs."""

    enabled: bool = True
    """Record the run in MLflow."""
    offline: bool = False
    """Keep records in the output folder until `dpt sync` sends them, for machines that cannot reach the store."""
    uri: str = "sqlite:///mlflow.db"
    """MLflow tracking store: an SQLite file or a server's address."""
    experiment: str = "dpt"
    """Experiment that the run belongs to."""
    run_name: str = ""
    """Name of the run; empty: stage, preset and task."""
    tags: dict[str, str] = field(default_factory=dict)
    """Further tags of the run."""
    system_every: float = 10.0
    """Seconds between readings of every node's CPU, memory, disks, network and GPUs (MLflow's names); 0: none."""
    registered_model: str = ""
    """Model in MLflow's registry to add the exported weights to as a version; empty: none."""

    def __post_init__(self) -> None:
        check(
            not set(self.registered_model) & set("/:'\""),
            f'dpt.tracking.registered_model is "{self.registered_model}"; names in MLflow\'s registry have no / : or quotes.',
        )
        check_fields(self, "dpt.tracking", NOT_NEGATIVE, "system_every")
