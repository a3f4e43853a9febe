"""Pictures and arrays of a step's routing, drawn while a Mixture-of-Experts trains."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dpt import distributed
from dpt.config.recipe import DptConfig
from dpt.models.dit import DiT
from dpt.models.routing_pictures import RoutingTally
from dpt.tracking import Run
from dpt.training.step import Inputs


class ExpertPictures:
    """Watches the forward passes of steps that are drawn. Does nothing at other steps, nor where tokens bypass blocks:
    experts of different layers then see different ones."""

    def __init__(self, network: DiT, config: DptConfig, folder: Path) -> None:
        self.network, self.config, self.folder = network, config, folder
        self.tally: RoutingTally | None = None

    def begin(self, drawn: bool) -> None:
        """Start a step; its routing is counted if it is `drawn`."""
        self.tally = None
        if drawn and self.config.model.num_experts and not self.config.training.bypass_share:
            self.tally = RoutingTally(self.network, num_train_timesteps=self.config.diffusion.num_train_timesteps)

    @contextmanager
    def watch(self, inputs: Inputs) -> Iterator[None]:
        """Watch a micro-batch's forward and backward pass."""
        if self.tally is None:
            yield
            return
        with self.tally.watch(inputs.timesteps, inputs.labels, tuple(inputs.latents.shape[2:])):
            yield

    def draw(self, step: int, run: Run) -> None:
        """Save the counts as `STEP/*.png` and `STEP/routing.npz`, and send them with how even the loads are. Collective."""
        if self.tally is None:
            return
        tally, self.tally = self.tally, None
        tally.all_reduce()
        if not distributed.is_main():
            return
        report = tally.report()
        try:
            files = report.save(self.folder / f"{step:08d}")
        except OSError as error:  # a full disk costs pictures, not the run
            distributed.log(f"No pictures of the routing were drawn: {error}")
            return
        for file in files:
            if file.suffix == ".png":
                run.log_picture(file, f"routing_{file.stem}", step)
            else:
                run.log_artifact(file, f"routing/{step:08d}")
        evenness = report.load_entropy.tolist()
        unused = float((report.tokens_per_expert == 0).sum())
        loads = {"experts/evenness": sum(evenness) / len(evenness), "experts/least_evenness": min(evenness)}
        run.log_metrics(loads | {"experts/unused": unused}, step)
        distributed.log(f"Routing: {files[0].parent}")
