"""Score a model's predictions by each data set's own protocol, over sampler steps and ensemble sizes; or, with
--generation.reference, the images of class-conditional weights."""

import os

from dpt import distributed
from dpt.config.command import parse_command
from dpt.errors import reported
from dpt.plugins import load_plugins

if __name__ == "__main__":
    with reported("evaluate"):
        load_plugins()
        distributed.set_environment()
        recipe = parse_command("evaluate", __doc__ or "", "evaluation")
        if int(os.environ["WORLD_SIZE"]) > 1:
            distributed.init()
        from dpt.evaluation.generation_runner import format_metrics, run_generation
        from dpt.evaluation.runner import run_evaluation
        from dpt.evaluation.summary import format_summary
        from dpt.training.export import load_weights

        with recipe.blamed():
            if recipe.dpt.generation.reference:
                said = format_metrics(run_generation(recipe, read=load_weights))
            else:
                said = format_summary(run_evaluation(recipe, read=load_weights))
        distributed.log(said)
        distributed.shutdown()
