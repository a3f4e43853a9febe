"""Progress as lines, where there is no terminal."""

from dpt import progress


def test_progress_prints_lines_with_rate_and_time_left(capsys, monkeypatch):
    monkeypatch.setattr(progress, "LINE_INTERVAL_S", 0.0)
    assert list(progress.progress(range(3), "reading", "file")) == [0, 1, 2]
    with progress.progress(2, "steps", "step") as bar:
        bar.update(text="loss 0.5")
    lines = capsys.readouterr().err.splitlines()
    assert any(line.startswith("reading: 3/3 [") and "file/s" in line for line in lines)
    assert any(line.startswith("steps: 1/2 [") and line.endswith("loss 0.5]") for line in lines)
    assert sum(line.startswith("steps: 1/2 [") for line in lines) == 1  # not again at the end


def test_lines_go_to_standard_output_whole_and_at_once(capsys):
    with progress.progress(2, "steps", "step"):
        progress.say("OUT/a_depth.npy")
        assert capsys.readouterr().out == "OUT/a_depth.npy\n"
