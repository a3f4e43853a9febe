"""Depth carried through a video: no flicker, no fading, cuts begin anew; stopped videos go on; files by their libraries."""

import os

import numpy as np
import pytest
from PIL import Image

from dpt.config.sections import EvaluationConfig
from dpt.errors import UserError
from dpt.evaluation import Prediction, Predictor, videos
from dpt.evaluation.frames import Source, find_sources, iter_frames
from dpt.evaluation.outputs import OutputConfig
from dpt.evaluation.predicting import predict_files
from dpt.evaluation.videos import Carried, align_to, predict_video
from dpt.tasks import resize_smooth
from tests.evaluation.tiny import calls_of, make_model, stop_at


def _scene(seed: int) -> np.ndarray:
    return resize_smooth(np.random.default_rng(seed).random((4, 4)).astype(np.float32), (24, 32))


def _prediction(value: np.ndarray) -> Prediction:
    return Prediction(value=value.astype(np.float32), uncertainty=np.full(value.shape, 0.1, np.float32))


def test_scale_and_shift_are_undone_although_something_moves():
    scene = _scene(0)
    scale, shift = align_to(3.0 * scene - 1.0, scene)
    assert (scale, shift) == (pytest.approx(1 / 3, rel=1e-5), pytest.approx(1 / 3, rel=1e-5))
    moved = scene.copy()
    moved[:8, :8] += 2.0
    scale, shift = align_to(3.0 * moved - 1.0, scene)
    np.testing.assert_allclose(scale * (3.0 * scene - 1.0) + shift, scene, atol=0.1)
    assert align_to(np.ones_like(scene), scene) is None
    assert align_to(-scene, scene) is None


def test_a_long_video_neither_flickers_nor_fades():
    rng, scene = np.random.default_rng(1), _scene(0)
    carried, last = Carried(), None
    for number in range(150):
        seen = scene + rng.normal(0, 0.03, scene.shape)
        last = carried.align(_prediction(rng.uniform(0.5, 2.0) * seen + rng.uniform(-1, 1)))
        if number == 0:
            first, limits = last, carried.limits
    assert last.value.std() == pytest.approx(first.value.std(), rel=0.1)
    assert last.value.mean() == pytest.approx(first.value.mean(), abs=0.1 * float(first.value.std()))
    assert carried.limits == limits
    carried.align(_prediction(-scene))  # a cut
    assert carried.limits != limits


def test_frames_start_from_the_same_noise_and_a_stopped_video_goes_on(tmp_path, monkeypatch):
    config = EvaluationConfig(batch_size=2, steps=[1])
    predictor = Predictor(make_model(num_conditions=1), config=config, device="cpu")
    rng = np.random.default_rng(0)
    still = rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)
    frames = [still, still] + [np.clip(still + rng.integers(0, 9, still.shape), 0, 255).astype(np.uint8) for _ in range(3)]
    pictures = [Image.fromarray(f) for f in frames]
    pictures[0].save(tmp_path / "clip.gif", save_all=True, append_images=pictures[1:], duration=40, loop=0)
    (tmp_path / "frames").mkdir()
    for i, picture in enumerate(pictures):
        picture.save(tmp_path / "frames" / f"{i}.png")
    (source,) = find_sources([tmp_path / "frames"], as_frames=True)
    outputs = OutputConfig(formats=("npy", "colour", "png16"))

    def depths(out):
        return [np.load(f) for f in sorted((tmp_path / out / "frames").glob("*_depth.npy"))]

    files = predict_video(predictor, source, tmp_path / "whole", task="depth", outputs=outputs)
    whole = depths("whole")
    assert len(whole) == 5
    np.testing.assert_allclose(whole[0], whole[1], atol=1e-5)  # one picture, one noise: one result
    assert all(file.is_file() for file in files)

    more = {"task": "depth", "outputs": outputs, "settings": {"steps": 1}}
    stop_at(monkeypatch, videos, 4)
    with pytest.raises(KeyboardInterrupt):
        predict_video(predictor, source, tmp_path / "two", **more)
    calls = calls_of(monkeypatch, Predictor, "__call__")
    predict_video(predictor, source, tmp_path / "two", **more)
    assert [len(images) for (_, images), _ in calls] == [2, 1]  # not the first batch
    for a, b in zip(whole, depths("two"), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)

    (clip,) = find_sources([tmp_path / "clip.gif"])
    assert clip.is_video
    files = predict_video(predictor, clip, tmp_path / "gif", task="depth", outputs=outputs)
    assert files[-1] == tmp_path / "gif" / "clip_depth.gif"
    with Image.open(files[-1]) as made:
        assert (made.n_frames, made.size) == (4, (32, 32))  # equal ones are one
    with pytest.raises(UserError, match="whole objects need a mask"):
        predict_video(predictor, clip, tmp_path / "gif", task="amodal", outputs=OutputConfig())


def test_flow_goes_from_each_frame_to_the_next(tmp_path):
    predictor = Predictor(make_model("flow"), config=EvaluationConfig(batch_size=3, steps=[1]), device="cpu")
    for i, image in enumerate(np.random.default_rng(0).integers(0, 255, (3, 32, 32, 3), dtype=np.uint8)):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    source = Source(name="v", path=tmp_path, frames=tuple(sorted(tmp_path.glob("*.png"))))
    files = predict_video(predictor, source, tmp_path / "out", task="flow", outputs=OutputConfig(formats=("flo",)))
    assert [f.name for f in files] == ["000000_flow.flo", "000001_flow.flo"]


def test_videos_without_a_library_or_that_are_none_cost_a_sentence(tmp_path):
    file = tmp_path / "a.mp4"
    file.write_bytes(b"no video")
    with pytest.raises(UserError, match=r"a\.mp4: (reading videos needs the package av|not a video that can be read)"):
        list(iter_frames(Source(name="a", path=file)))


def test_mp4_in_and_out(tmp_path):
    pytest.importorskip("av")
    from dpt.evaluation.frames import count_frames, write_video

    picture = tmp_path / "a.png"
    Image.fromarray(np.full((33, 48, 3), (200, 40, 90), np.uint8)).save(picture)
    write_video(tmp_path / "a.mp4", [picture] * 4, 25.0)
    source = Source(name="a", path=tmp_path / "a.mp4")
    frames = list(iter_frames(source))
    assert len(frames) == count_frames(source) == 4
    assert frames[0].shape == (32, 48, 3)
    np.testing.assert_allclose(frames[0].mean((0, 1)), (200, 40, 90), atol=6)


def test_phones_videos_are_turned_and_containers_without_a_count_have_one(tmp_path):
    av = pytest.importorskip("av")
    from dpt.evaluation.frames import count_frames

    picture = np.zeros((32, 48, 3), np.uint8)
    picture[:, :24] = 255  # white on the left
    for name, kind, turn in (("turned.mp4", "mp4", 90), ("plain.mkv", "matroska", 0)):
        with av.open(str(tmp_path / name), "w", format=kind) as container:
            stream = container.add_stream("h264", rate=12)
            stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
            if turn and not hasattr(stream, "set_display_rotation"):
                pytest.skip("this av cannot write the turn that phones write")
            if turn:
                stream.set_display_rotation(turn)
            for _ in range(6):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode(None))
    frames = list(iter_frames(Source(name="a", path=tmp_path / "turned.mp4")))
    assert frames[0].shape == (48, 32, 3)
    assert frames[0][36:].mean() > 200 > 50 > frames[0][:12].mean()  # counterclockwise: left is below
    assert count_frames(Source(name="a", path=tmp_path / "plain.mkv")) == 6


def test_a_video_that_has_changed_begins_anew(tmp_path, monkeypatch):
    predictor = Predictor(make_model(num_conditions=1), config=EvaluationConfig(batch_size=1, steps=[1]), device="cpu")
    rng = np.random.default_rng(0)
    (tmp_path / "v").mkdir()
    for i in range(3):
        Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(tmp_path / "v" / f"{i}.png")
    sources = find_sources([tmp_path / "v"], as_frames=True)
    numbers = stop_at(monkeypatch, videos, 3)
    with pytest.raises(KeyboardInterrupt):
        predict_files(predictor, sources[:1], tmp_path / "out", settings=[1])
    os.utime(tmp_path / "v" / "0.png", (2**31, 2**31))
    predict_files(predictor, sources[:1], tmp_path / "out", settings=[1])
    assert numbers[3:] == ["000000", "000001", "000002"]
