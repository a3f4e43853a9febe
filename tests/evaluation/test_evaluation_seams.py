"""Where evaluation meets weights, shards, records and tables."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from dpt import target_codes, tasks
from dpt.config.sections import EvaluationConfig
from dpt.data.manifest import read_manifest, write_manifest
from dpt.errors import UserError
from dpt.evaluation.ensembling import merge_depth
from dpt.evaluation.generation import ImageSource
from dpt.evaluation.prediction import Predictor
from dpt.evaluation.protocols import HIGHER_IS_BETTER, PROTOCOLS, LogFit, average, score
from dpt.evaluation.runner import check_set, evaluate
from dpt.evaluation.sets import EvaluationSet
from dpt.scores import METRICS
from tests.evaluation.tiny import make_model, make_set


@pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=list(PROTOCOLS))
def test_every_main_metric_is_an_average_and_a_column(protocol):
    shape = (2, 8, 8) if protocol.task == "flow" else (8, 8)
    truth = np.random.default_rng(0).uniform(1, 5, shape).astype(np.float32)
    truth = truth > 3 if protocol.task == "amodal" else truth
    protocol = dataclasses.replace(protocol, crop=None, log_fit=LogFit())
    figures = average([score(protocol, truth, truth)])
    assert protocol.main_metric in figures
    assert METRICS[protocol.main_metric].lower_is_better is not (protocol.main_metric in HIGHER_IS_BETTER)


def test_weights_with_clip_refuse_what_has_none(tmp_path):
    predictor = Predictor(make_model("amodal", clip_embedding_size=6), device="cpu")
    with pytest.raises(UserError, match="no CLIP embeddings, the weights take 6"):
        check_set(EvaluationSet(make_set(tmp_path / "set", "amodal", count=1)), predictor)
    image = np.zeros((32, 32, 3), np.uint8)
    with pytest.raises(UserError, match="--clip"):
        predictor([image], others=[image[..., 0] > 0])


def test_depth_prompts_that_the_weights_have_not_learnt_with(tmp_path, capsys):
    """Prompts made of the truth are refused; the all-valid one, which tells nothing, is named."""
    folders = {}
    for prompt in tasks.DEPTH_PROMPTS:
        folders[prompt] = make_set(tmp_path / prompt, count=1)
        manifest = read_manifest(folders[prompt])
        write_manifest(folders[prompt], dataclasses.replace(manifest, encoding={"prompt": prompt}))
    config = EvaluationConfig(output_dir=str(tmp_path / "out"), steps=[1], ensemble=[1], pictures=0)

    def scored(prompt, learnt, **model):
        predictor = Predictor(dataclasses.replace(make_model(**model), depth_prompt=learnt), config=config, device="cpu")
        summary = evaluate(dataclasses.replace(config, data=[str(folders[prompt])]), predictor=predictor)
        return summary["sets"]["synthetic_val"]["depth_prompt"]

    with pytest.raises(UserError, match="--prompt ground_truth, the weights learnt with all_valid; encode the set"):
        scored("ground_truth", "all_valid")
    assert scored("ground_truth", "all_valid", num_conditions=1) == "ground_truth"  # which such a network is not shown
    assert scored("ground_truth", "ground_truth") == "ground_truth"
    assert "learnt with" not in capsys.readouterr().out
    assert scored("all_valid", "ground_truth") == "all_valid"
    assert "asked with the prompt all_valid; the weights learnt with ground_truth" in capsys.readouterr().out


def test_flow_is_decoded_as_the_weights_code_it():
    flow = np.stack([np.full((384, 512), 30.0), np.full((384, 512), -15.0)]).astype(np.float32)
    images = target_codes.encode_flow(flow, "linear_75")
    assert images[:, 0, 0, 0] == pytest.approx([30 / 75, -15 / 75])
    again = [target_codes.decode_flow(images[a], a, (512, 384)[a], "linear_75") for a in (0, 1)]
    np.testing.assert_allclose(np.stack(again), flow, rtol=1e-5)
    model = make_model("flow")
    latents = torch.rand(1, 1, 2, 4, 4, 4) - 0.5
    ours, theirs = (
        Predictor(dataclasses.replace(model, codes={"flow": code}), device="cpu").decode(latents, "flow")
        for code in target_codes.FLOW_CODES
    )
    assert not torch.allclose(ours, theirs)


def test_depth_is_decoded_as_the_weights_code_it_and_scored_as_depth(tmp_path):
    """The same network, told of another code, predicts other depth; what shards hold is decoded in their code, so that the
    ceiling is the code's and the VAE's, not the weights'; and records of another code are not taken up."""
    folders = {code: make_set(tmp_path / code, count=2, code=code) for code in target_codes.DEPTH_CODES}
    config = EvaluationConfig(output_dir=str(tmp_path / "out"), steps=[1], ensemble=[1], pictures=0)
    found, ceilings = {}, []
    for code in target_codes.DEPTH_CODES:
        model = dataclasses.replace(make_model(), codes={"depth": code, "flow": "log"})
        predictor = Predictor(model, config=config, device="cpu")
        summary = evaluate(dataclasses.replace(config, data=list(map(str, folders.values()))), predictor=predictor)
        assert summary["settings"]["codes"] == {"depth": code, "flow": "log"}
        results = [one["results"][0]["metrics"]["abs_rel"] for one in summary["sets"].values()]
        assert results[1:] == pytest.approx(results[:-1])  # images and truths are the same in all three
        found[code] = results[0]
        ceilings.append([one["ceiling"]["abs_rel"] for one in summary["sets"].values()])
    assert len({round(value, 6) for value in found.values()}) == 3
    assert ceilings[0] == ceilings[1] == ceilings[2]
    assert max(ceilings[0]) < 0.12


def test_values_that_are_not_finite_are_refused_by_name():
    maps = torch.rand(2, 3, 4, 4)
    maps[1, 2, 0, 0] = float("nan")
    with pytest.raises(UserError, match="input 1: depth map 2 of 3"):
        merge_depth(maps)
    model = make_model()
    with torch.no_grad():
        next(model.network.parameters()).fill_(float("nan"))
    with pytest.raises(UserError, match=r"room.*not finite"):
        Predictor(model, device="cpu")([np.zeros((32, 32, 3), np.uint8)], keys=["room"], steps=1, ensemble=1)


def test_pictures_of_other_sizes_are_cropped_not_stretched(tmp_path):
    wide = np.zeros((32, 64, 3), np.uint8)
    wide[:, 16:48] = 200  # the centre is what is left
    Image.fromarray(np.full((32, 32, 3), 9, np.uint8)).save(tmp_path / "0.png")
    Image.fromarray(wide).save(tmp_path / "1.png")
    cropped = ImageSource(tmp_path).batch([1])
    assert cropped.shape == (1, 32, 32, 3)
    assert (cropped == 200).all()
