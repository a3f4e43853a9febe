"""References for generated images: real images, or statistics of their features stored earlier."""

import dataclasses
from pathlib import Path
from typing import Any

from dpt import distributed
from dpt.config.generation import GenerationConfig
from dpt.errors import UserError
from dpt.evaluation.feature_networks import FeatureNetwork
from dpt.evaluation.generation import collect_features, spread
from dpt.evaluation.image_sources import ImageSource, Statistics, has_images, read_statistics, write_statistics


class Reference:
    """`config.reference`, opened and checked against the network and the images' `resolution`; nothing is computed yet.

    stored: statistics in a file, or None. source: its images, or None; a file with statistics may hold some of them, as ADM's
    do for precision and recall. manifold: number of images that precision and recall will use, or 0. UserError for a
    reference of another size or network.
    """

    def __init__(
        self, config: GenerationConfig, network: FeatureNetwork, resolution: int, *, codec: Any = None, cache_dir: str = ""
    ) -> None:
        self._config, self._resolution = config, resolution
        self.stored: Statistics | None = read_statistics(config.reference)
        self.source: ImageSource | None = None
        found = 0
        if self.stored is None or (self.stored.features is None and has_images(config.reference)):
            self.source = ImageSource(config.reference, codec=codec, cache_dir=cache_dir)
            if self.stored is not None or self.source.prepared:
                found = self.source.resolution
            self.source.resolution = resolution
        if self.stored is not None:
            found = found or self.stored.resolution
            if self.stored.network and self.stored.network != network.sha256:
                raise UserError(
                    f"{config.reference}: made with the feature network {self.stored.network[:12]}, not {network.sha256[:12]} "
                    f"({network.name}); use the same for both."
                )
        if found and found != resolution:
            raise UserError(
                f"{config.reference}: a reference of {found} x {found} pixels, for images of {resolution} x {resolution}; give "
                "one of their size."
            )
        features = self.stored.features if self.stored is not None else None
        here = len(self.source) if self.source is not None else 0 if features is None else len(features)
        self.manifold = min(here, config.manifold_images)
        self.kind = "statistics" if self.stored is not None else self.source.kind if self.source is not None else ""
        self.count = self.stored.count if self.stored is not None else here

    def statistics(self, network: FeatureNetwork) -> Statistics:
        """The reference's statistics, on every rank, also saved to a file if the config names one. Collective."""
        config, found = self._config, self.stored
        if self.source is not None:
            part = collect_features(self.source, network, manifold_images=config.manifold_images, title="the reference")
            found = part if found is None else dataclasses.replace(found, features=part.features)
        assert found is not None
        if found.features is not None and len(found.features) > config.manifold_images:
            rows = spread(len(found.features), config.manifold_images)
            found = dataclasses.replace(found, features=found.features[rows])
        with distributed.shared_errors():
            if config.save_reference and distributed.is_main():
                kept = dataclasses.replace(found, network=network.sha256, resolution=self._resolution)
                write_statistics(Path(config.save_reference), kept)
        return found
