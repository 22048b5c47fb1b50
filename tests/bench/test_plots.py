"""The pictures of a report show its numbers, read back from what is drawn."""

import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_rgba
from matplotlib.image import imread

from deer_jax.bench import plots
from deer_jax.bench.curves import learning_curve, read_curves
from deer_jax.bench.report import BenchReport, MethodReport
from deer_jax.cli import bench as verb
from deer_jax.cli import main as cli
from deer_jax.decoding.acceptance import acceptance_by_depth
from deer_jax.errors import InputError

LONG = "a-drafter-with-a-long-name/of_several-parts/" * 2


def method(drafter, histogram, cost, interval=True):
    histogram = np.asarray(histogram)
    rounds, committed = int(histogram.sum()), int(histogram @ np.arange(1, len(histogram) + 1))
    tau = committed / rounds
    return MethodReport(
        drafter=drafter, draft_length=len(histogram) - 1, temperature=0.0, batch_size=2, acceptance_length=tau,
        ci95=(tau - 0.25, tau + 0.125) if interval else None, round_cost=cost, tokens_per_second=1.0,
        decode_tokens_per_second=2.0, speedup=0.9 * tau / cost,
        speedup_range=(0.8 * tau / cost, tau / cost), speed_range=(0.75, 1.25), exact_match=1.0, rows_differing=0,
        near_ties=0, accepted_histogram=histogram.tolist(), acceptance_by_depth=acceptance_by_depth(histogram),
        repeated_8grams=0.0, seconds=1.0, prefill_seconds=0.5, compile_seconds=1.0, new_tokens=committed, rounds=rounds,
    )  # fmt: skip


def report(**methods):
    found = {name.replace("_k", " k="): each for name, each in methods.items()}
    machine = {"platform": "cpu", "device_kind": "some cpu", "devices": 1, "cores": 2, "jax": "0.1"}
    return BenchReport(
        methods={"plain": method(None, [99], 1.0), **found}, machine=machine, date="2026-01-02", command="",
        target="some-target", prompts=12, repeats=2, settings={"dtype": "float32"},
    )  # fmt: skip


@pytest.fixture
def several():
    """a gains at k = 2 and loses at k = 4 and 8, b has one k; the order of the lengths is not sorted."""
    return report(
        a_k4=method("a", [10, 100, 60, 1, 29], 3.5), a_k2=method("a", [10, 100, 90], 1.5),
        a_k8=method("a", [0, 150, 50, 0, 0, 0, 0, 0, 0], 5.0), b_k3=method("b", [50, 50, 50, 50], 1.25, interval=False),
    )  # fmt: skip


def texts(figure):
    """Everything that a figure says outside its ticks, with line breaks as spaces."""
    found = [text.get_text() for text in figure.texts]
    found += [text.get_text() for legend in figure.legends for text in legend.get_texts()]
    for axes in figure.axes:
        found += [axes.get_title(), axes.get_xlabel(), axes.get_ylabel()]
    return [" ".join(text.split()) for text in [figure.get_suptitle(), *found]]


def points(line):
    return list(zip(line.get_xdata(), line.get_ydata(), strict=True))


def test_histogram(several):
    figure = plots.histogram(several)
    drafted = {name: each for name, each in several.methods.items() if name != "plain"}
    for axes, (name, each) in zip(figure.axes, drafted.items(), strict=True):
        shares = [bar.get_height() for bar in axes.containers[0]]
        assert shares == [count / each.rounds for count in each.accepted_histogram]
        assert [bar.get_center()[0] for bar in axes.containers[0]] == list(range(each.draft_length + 1))
        assert axes.lines[0].get_xdata() == [each.acceptance_length - 1] * 2
        assert axes.get_title().startswith(f"{name}\nτ {each.acceptance_length:.2f}")
        bands = [patch for patch in axes.patches if patch not in axes.containers[0]]
        assert [(band.get_x(), band.get_width()) for band in bands] == (
            [] if each.ci95 is None else [(pytest.approx(each.ci95[0] - 1), pytest.approx(0.375))]
        )
    assert len({axes.get_ylim() for axes in figure.axes}) == 1
    assert "share of rounds" in texts(figure)


def test_depth(several):
    left, right = plots.depth(several).axes
    drafted = list(several.methods.values())[1:]
    chances, shares = left.lines[::2], right.lines
    for each, chance, share in zip(drafted, chances, shares, strict=True):
        known = [value for value in each.acceptance_by_depth if value is not None]
        np.testing.assert_array_equal(chance.get_ydata()[: len(known)], known)
        assert np.isnan(chance.get_ydata()[len(known) :]).all()
        assert list(share.get_xdata()) == list(chance.get_xdata()) == list(range(1, each.draft_length + 1))
        assert np.sum(share.get_ydata()) == pytest.approx(each.acceptance_length - 1)
        assert chance.get_color() == share.get_color()
    # Of a at k = 4, 30 rounds got to the fourth draft; that is 15 in each of the 2 repeats.
    hollow = left.lines[1]
    assert points(hollow) == [(4, 29 / 30)]
    assert hollow.get_markerfacecolor() == "white"


def test_speed(several):
    figure = plots.speed(several)
    first, a, b = figure.axes
    methods = several.methods
    lines = [points(line) for line in first.lines]
    assert lines[0] == [(k, methods[f"a k={k}"].speedup) for k in (2, 4, 8)]
    assert lines[1] == [(3, methods["b k=3"].speedup)]
    assert list(first.lines[2].get_ydata()) == [1, 1]
    spread = [segment[:, 1].tolist() for segment in first.collections[0].get_segments()]
    assert spread == [list(methods[f"a k={k}"].speedup_range) for k in (2, 4, 8)]
    assert any("b k=3: its repeats differ by 67%" in text for text in texts(figure))
    tau, cost = a.lines[0], a.lines[-2]
    assert points(tau) == [(k, methods[f"a k={k}"].acceptance_length) for k in (2, 4, 8)]
    assert points(cost) == [(2, 1.5), (4, 3.5), (8, 5.0)]
    bars = a.containers[0].lines[2][0].get_segments()
    np.testing.assert_allclose([bar[:, 1] for bar in bars], [methods[f"a k={k}"].ci95 for k in (2, 4, 8)])
    assert b.lines[0].get_ydata() == [2.5]
    assert a.get_ylim() == b.get_ylim()
    assert [tick for tick in a.get_xticks() if 1.9 < tick < 8.1] == [2, 4, 8]


def test_gain_and_loss_are_where_the_lines_say(several):
    _, a, b = plots.speed(several).axes
    gain, loss = (shade.get_paths() for shade in a.collections[-2:])
    ahead, behind = (several.methods[f"a k={k}"].acceptance_length - cost for k, cost in ((2, 1.5), (4, 3.5)))
    crossing = 2 ** (1 + ahead / (ahead - behind))  # between 2 and 4, of lines straight on the logarithmic axis
    assert 2 < crossing < 4
    assert gain[0].vertices[:, 0].min() == pytest.approx(2)
    assert gain[0].vertices[:, 0].max() == pytest.approx(crossing, rel=1e-3)
    assert loss[0].vertices[:, 0].min() == pytest.approx(crossing, rel=1e-3)
    assert loss[0].vertices[:, 0].max() == pytest.approx(8)
    gain, loss = (shade.get_paths() for shade in b.collections[-2:])
    assert gain[0].vertices[:, 1].max() == 2.5  # a strip at the only k
    assert gain[0].vertices[:, 1].min() == 1.25
    assert len(loss) == 0


@pytest.mark.parametrize("draw", [plots.histogram, plots.depth, plots.speed])
def test_every_picture_says_what_it_shows(several, draw):
    figure = draw(several)
    found = texts(figure)
    assert figure.get_suptitle()
    assert all(axes.get_xlabel() and axes.get_ylabel() and axes.get_title() for axes in figure.axes)
    footer = next(text for text in found if "some-target" in text)
    for part in ("12 prompts x 2 repeats", "T=0", "float32", "batch 2", "some cpu", "2 cores", "2026-01-02"):
        assert part in footer


def test_lines_differ_without_colour():
    styles = [plots.Style.number(i) for i in range(35)]
    assert len({(style.marker, style.linestyle) for style in styles}) == 35
    assert len({style.color for style in styles}) == len(plots.COLORS)


@pytest.mark.parametrize("draw", [plots.histogram, plots.depth, plots.speed])
@pytest.mark.parametrize("names", [["a"], ["_a", "$b_c$", "d^e"], [f"{LONG}{i}" for i in range(6)]], ids=len)
def test_any_names_leave_every_text_its_place(draw, names):
    found = report(**{f"{name}_k4": method(name, [50, 40, 30, 20, 10], 1.5) for name in names})
    figure = draw(found)
    figure.draw_without_rendering()
    renderer = figure.canvas.get_renderer()
    artists = [*figure.texts, *figure.legends, *(axes.title for axes in figure.axes)]
    artists += [label for axes in figure.axes for label in (axes.xaxis.label, axes.yaxis.label)]
    boxes = [artist.get_window_extent(renderer) for artist in artists]
    for i, box in enumerate(boxes):
        assert box.x0 >= 0
        assert box.y0 >= 0
        assert box.x1 <= figure.bbox.x1
        assert box.y1 <= figure.bbox.y1
        assert not any(box.overlaps(other) for other in boxes[:i])
        assert not any(box.overlaps(axes.get_window_extent(renderer)) for axes in figure.axes)
    shown = "".join("".join(texts(figure)).replace("\\$", "$").split())
    assert all("".join(name.split()) in shown for name in names)


def run_folder(path, *, tokens=True, evaluated=True):
    """What an align run leaves: two draft lengths, evaluated at steps 0 and 20."""

    def count(step):
        return {"tokens": 1000 * step} if tokens else {}

    def evaluation(step):
        found = [
            {"draft_length": k, "temperature": 0.0, "acceptance_length": 2 + step / 10 + k, "prompts": 16,
             "ci95": [1.5 + k, 2.5 + step / 10 + k] if k == 4 else None}
            for k in (4, 8)
        ]  # fmt: skip
        return {"step": step, **count(step), "evaluation": found}

    lines = [{"step": 1, **count(1), "loss": 3.5}, {"step": 20, **count(20), "loss": 2.5}]
    if evaluated:
        lines = [evaluation(0), *lines, evaluation(20)]
    path.mkdir(parents=True)
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 21, "lo')
    (path / "recipe.yaml").write_text("target: models/some-target\n", encoding="utf-8")
    return path


def test_curve(tmp_path):
    curves = read_curves([run_folder(tmp_path / "a" / "run"), run_folder(tmp_path / "mine")])
    assert [each.name for each in curves] == ["run: k=4, T=0", "run: k=8, T=0", "mine: k=4, T=0", "mine: k=8, T=0"]
    figure = plots.curve(curves)
    (axes,) = figure.axes
    assert [points(line) for line in axes.lines[:2]] == [[(0, 6), (20000, 8)], [(0, 10), (20000, 12)]]
    band = axes.collections[0].get_paths()[0].vertices
    assert {tuple(point) for point in band} == {(0, 5.5), (0, 6.5), (20000, 5.5), (20000, 8.5)}
    assert "text tokens" in axes.get_xlabel()
    assert "tokens per round" in axes.get_ylabel()
    assert any("target some-target, 16 held-out prompts" in text for text in texts(figure))


def test_public_ways_to_the_pictures(tmp_path, several):
    run_folder(tmp_path / "run")
    assert texts(learning_curve(tmp_path / "run")) == texts(plots.curve(read_curves([tmp_path / "run"])))
    for name, draw in (("speed", plots.speed), ("depth", plots.depth), ("histogram", plots.histogram)):
        assert texts(several.picture(name)) == texts(draw(several))
    with pytest.raises(InputError, match="name must be one of histogram, depth, speed, got 'curve'"):
        several.picture("curve")
    assert several.table().row_count == 5


def test_curve_against_steps_where_a_run_counts_no_tokens(tmp_path):
    folders = [run_folder(tmp_path / "a" / "run"), run_folder(tmp_path / "b" / "run", tokens=False)]
    curves = read_curves([*folders, folders[0]])
    assert [each.run for each in curves[::2]] == [str(folder) for folder in folders]  # the names alone are the same
    (axes,) = plots.curve(curves).axes
    assert all(list(line.get_xdata()) == [0, 20] for line in axes.lines[:4])
    assert "steps" in axes.get_xlabel()


def test_a_run_that_began_without_counting_has_no_tokens(tmp_path):
    folder = run_folder(tmp_path / "run", tokens=False)
    with (folder / "metrics.jsonl").open("r+", encoding="utf-8") as file:
        whole = [line for line in file if line.endswith("\n")]
        file.seek(0)
        file.truncate()
        file.writelines([*whole[:-1], json.dumps(json.loads(whole[-1]) | {"tokens": 300}) + "\n"])
    assert read_curves([folder])[0].tokens is None


def test_refused_runs(tmp_path):
    with pytest.raises(InputError, match=r"none: metrics.jsonl cannot be read: No such file"):
        read_curves([tmp_path / "none"])
    with pytest.raises(InputError, match="no evaluation in its metrics"):
        read_curves([run_folder(tmp_path / "silent", evaluated=False)])
    for i, text in enumerate(["{\n", "[]\n", '{"evaluation": [{"draft_length": 4}], "step": 1}\n']):
        folder = run_folder(tmp_path / f"damaged{i}")
        (folder / "metrics.jsonl").write_text(text, encoding="utf-8")
        with pytest.raises(InputError, match=r"metrics.jsonl is damaged, or not that of an align run"):
            read_curves([folder])
    with pytest.raises(InputError, match="no curves"):
        plots.curve([])


def test_write(tmp_path, several):
    curves = read_curves([run_folder(tmp_path / "run")])
    paths = plots.write(several, tmp_path / "plots", curves)
    assert [path.name for path in paths] == ["histogram.png", "depth.png", "speed.png", "curve.png"]
    assert sorted(paths) == sorted((tmp_path / "plots").iterdir())
    for path in paths:
        picture = imread(path)
        assert 600 < picture.shape[1] < 2000
        assert (picture[..., :3] == np.array(to_rgba(plots.COLORS[0])[:3], np.float32)).all(axis=-1).any()
    assert plots.write(report(), tmp_path / "plots") == []
    assert plots.write(report(), tmp_path / "plots", curves) == [tmp_path / "plots" / "curve.png"]
    with pytest.raises(InputError, match="plain decoding alone"):
        plots.speed(report())


def test_nothing_global_is_touched(several):
    import matplotlib

    before = dict(matplotlib.rcParams), matplotlib.get_backend(auto_select=False)
    plots.speed(several)
    assert (dict(matplotlib.rcParams), matplotlib.get_backend(auto_select=False)) == before


def test_refused_folders(tmp_path, several):
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(InputError, match="file: is a file; name a folder"):
        plots.write(several, file)
    with pytest.raises(InputError, match=r"no folder .*none to make it in"):
        plots.write(several, tmp_path / "none" / "plots")
    (tmp_path / "histogram.png").mkdir()
    with pytest.raises(InputError, match=r"histogram.png: is a folder; name a file"):
        plots.write(several, tmp_path)
    with pytest.raises(InputError, match=r"histogram.png: cannot be written: "):
        plots.check_folder(Path("/proc/self"))  # where nobody may make a file


def test_links_are_not_followed(tmp_path, several):
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "depth.png").symlink_to(tmp_path / "mine")
    with pytest.raises(InputError, match=r"depth.png: is a link"):
        plots.write(several, tmp_path)
    assert (tmp_path / "mine").read_text() == "mine"


def test_options_of_the_command_line(capsys, monkeypatch, tmp_path, several):
    monkeypatch.setattr(cli, "keep_compiled_programs", lambda: None)
    monkeypatch.setattr(verb.Options, "load", lambda options, sources: (None, [None] * len(sources)))
    monkeypatch.setattr(verb, "bench", lambda *_, **__: several)
    folder, run = tmp_path / "plots", run_folder(tmp_path / "run")
    argv = ["bench", "--target", "t", "--drafter", "d", "--prompt", "a", "--plot", str(folder)]
    assert cli.main([*argv, "--curve", str(run)]) == 0
    printed = capsys.readouterr().out.splitlines()[-4:]
    assert printed == [str(folder / f"{name}.png") for name in ("histogram", "depth", "speed", "curve")]
    assert sorted(printed) == sorted(map(str, folder.iterdir()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--plot", "FILE"], "is a file; name a folder"),
        (["--plot", "none/plots"], "to make it in"),
        (["--curve", "RUN"], "--curve is drawn into a folder: add --plot FOLDER"),
        (["--plot", "plots", "--curve", "none"], "none: metrics.jsonl cannot be read"),
    ],
)
def test_wrong_options_are_one_line_before_any_work(capsys, monkeypatch, tmp_path, options, message):
    monkeypatch.setattr(cli, "keep_compiled_programs", lambda: None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FILE").touch()
    status = cli.main(["bench", "--target", "none", "--drafter", "from-target", "--prompt", "a", *options])
    out, err = capsys.readouterr()
    assert (status, out) == (2, "")
    assert err.startswith("deer-jax: error: ")
    assert err.count("\n") == 1
    assert message in err
    assert [path.name for path in tmp_path.iterdir()] == ["FILE"]
