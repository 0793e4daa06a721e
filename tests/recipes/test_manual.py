"""`rgdiff explain`, `rgdiff list` and completion: complete, short, without JAX, and true where the code can say so."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from importlib import import_module

import pytest

from rgdiff import rewards
from rgdiff.cli import main
from rgdiff.recipes import compose as recipe
from rgdiff.recipes import manual, plan
from rgdiff.recipes.completion import assignments
from rgdiff.recipes.constructors import read
from rgdiff.recipes.explain import settings

METHODS = ["draft_lv", "ddpo", "smc", "svdd", "tds"]  # one of each kind; all are slow
MEASURED = {"pigdm", "tmpd"}  # for measurements: the reward of these is no function
MASKED = {"drakes", "drakes_published", "svdd_exact"}  # checked by their recipes
SUMS = {"elegant", "mixed_adapters"}  # the plan counts one of their parts
TOLD = re.compile(r"([^;]+?) network calls (to tune|a sample)(?=;|,|$)")


def every(names):
    return [*METHODS, *(pytest.param(name, marks=pytest.mark.slow) for name in names if name not in METHODS)]


def out(capsys, *argv, code=0):
    assert main(list(argv)) == code
    told = capsys.readouterr()
    return (told.err if code else told.out).strip()


@pytest.mark.first(1)
@pytest.mark.parametrize("part", range(3))
def test_every_name_has_a_page_that_is_short_and_names_its_options(part):
    for group, name in manual.names()[part::3]:
        page = manual.page(manual.full(group, name))
        assert len(page.splitlines()) < 60, (group, name)
        summary = recipe.summary_of(name, group)
        assert " ".join(summary.split()) in " ".join(page.split()), (group, name)
        if group is None:
            assert all(f"{key}=" in page for key in ("seed", "out", "resume", *manual.chosen(name))), name
            continue
        file = recipe.config_dir() / group / f"{name}.yaml"
        for key, value, _ in settings([(file, "" if group == "domain" else group)]):
            hidden = key in (f"{group}.defaults", f"{group}.setting", f"{group}.guide", f"{group}._target_")
            if key.startswith(f"{group}.") and value not in ("", "{}") and not hidden:
                assert f"{key}={value}" in page, (group, name, key)


def test_a_page_has_the_law_the_cost_the_needs_and_who_uses_it():
    page = manual.page("svdd")
    for expected in (
        "p_pre(x) exp(r(x)/tau)/Z",
        "needs     any reward, a black box too",
        "network calls a sample",
        "https://arxiv.org/abs/2408.08252",
        "tfbind8_svdd",
        "measured  SVDD on images",
        "value@method.value=posterior_mean",
    ):
        assert expected in page, expected
    assert "p(x0) exp(r(x0)/temperature)/Z" in manual.page("draft_k") and "micro_batches=1" in manual.page("draft_k")
    assert "domain=digits or domain=mnist" in manual.page("reward=digit")
    assert "methods   lgd_mc" not in manual.page("likelihood") and "methods   pigdm" in manual.page("likelihood")


def test_names_that_several_things_have_are_told_apart():
    page = manual.page("custom")
    assert all(f"rgdiff explain {group}=custom" in page for group in ("domain", "prior", "reward"))


def test_pages_of_the_docs_and_groups_are_reached(capsys):
    for page in manual.DOCS.glob("*.md"):
        assert out(capsys, "explain", page.stem) == page.read_text(encoding="utf-8").strip()
    assert "bootstrap" in out(capsys, "explain", "surrogates") and "svdd" not in out(capsys, "explain", "surrogate")


def test_an_unknown_name_is_one_line_with_the_nearest(capsys):
    told = out(capsys, "explain", "svvd", code=2)
    assert len(told.splitlines()) == 1 and "svdd" in told
    assert "nothing is called 'method=quickstart'" in out(capsys, "explain", "method=quickstart", code=2)


def test_no_command_shows_three(capsys):
    told = out(capsys)
    assert sum(line.startswith("  rgdiff ") for line in told.splitlines()) == 3


def test_the_list_is_narrow_and_whole(capsys):
    lines = out(capsys, "list").splitlines()
    assert max(map(len, lines)) <= 100
    entries = [line.split()[0] for line in lines if line.startswith("  ")]
    assert sorted(entries) == sorted(name for _, name in manual.names())
    assert lines[1].split()[0] == "quickstart"


def test_a_summary_is_cut_where_a_clause_ends():
    assert manual.brief("a, b (arXiv 2401.00001); c", 40) == "a, b; c"
    assert manual.brief("one two three, four five: six seven", 24) == "one two three…"
    assert manual.brief("one two three four", 10) == "one two…"


def test_reading_needs_no_jax():
    code = (
        "import sys; from rgdiff.cli import main; from rgdiff.recipes.completion import assignments\n"
        "[main(argv) for argv in (['list'], ['explain', 'draft_k'], ['explain', 'methods'], [])]\n"
        "assignments('steer', ['method=svdd']); print(*{'jax', 'flax'} & set(sys.modules), 'end')"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-1] == "end"


@pytest.mark.parametrize(
    "path",
    [
        "tuners.draft_k",
        "tuners.drakes",
        "tuners.dxmi_released",
        "tuners.dpok",
        "samplers.tds",
        "samplers.das",
        "samplers.svdd",
    ],
)
def test_source_and_signature_agree(path):
    module, _, name = path.rpartition(".")
    parameters = inspect.signature(getattr(import_module(f"rgdiff.{module}"), name)).parameters.values()
    found = read(f"rgdiff.{path}")
    assert found is not None
    assert set(found.defaults) == {p.name for p in parameters if p.default is not p.empty}
    assert set(found.entries) >= {p.name for p in parameters}
    plain = {
        p.name: p.default for p in parameters if isinstance(p.default, int | str | None) and p.default is not p.empty
    }
    assert {name: found.defaults[name] for name in plain} == {name: repr(value) for name, value in plain.items()}


def built(name, reward=None):
    """A method of a recipe on a small prior of images, its settings, and those of the prior."""
    config = recipe.compose("steer", [f"method={name}", "prior=mlp", "prior.steps=10"])
    return recipe.build(config["method"]), config, recipe.build(config["prior"])


@pytest.mark.parametrize("name", every(recipe.names("method")))
def test_a_method_needs_what_it_says(name):
    """Those that want a gradient refuse a black box before anything is trained; the others take it."""
    need = next(one for one in manual.NEEDS if manual.header(name, "method")["needs"].startswith(one))
    if name in MASKED or name == "packaging":  # whose reward is a pair of classifiers
        return
    black_box = rewards.Task(*[rewards.from_host(lambda x0: x0.mean((1, 2, 3)))] * 2)
    method, _, settings = built(name)
    refused = False
    try:
        getattr(method, "suits", lambda task: None)(black_box)
        plan.parts(method, plan.stand_in(settings, (8, 8, 1)), black_box)
    except ValueError as error:
        refused = "gradient" in str(error) or "measurement" in str(error)
        assert refused, error
    learnt = name == "classifier_guidance"  # its gradient is that of a value's network
    assert learnt or refused == (need == "a differentiable reward")


@pytest.mark.parametrize("name", every(sorted({*recipe.names("method")} - MASKED - MEASURED - SUMS)))
def test_a_method_costs_what_it_says(name):
    """The plan's network calls, where it has them, are the header's at the same settings."""
    method, config, settings = built(name)
    counted = list(plan._network_calls(method, settings, (8, 8, 1), config["samples"]))
    numbers = {"T": 10, "samples": config["samples"]} | config["method"] | config["method"].get("options", {})
    said = {kind: text for text, kind in TOLD.findall(manual.header(name, "method").get("cost", ""))}
    for line in counted:
        number, kind = re.fullmatch(r"([\d,]+) network calls (to tune|a sample)", line).groups()
        if kind in said:
            assert eval(said[kind], {}, numbers) == int(number.replace(",", "")), (name, kind)
        else:
            assert name == "freedom"  # in words
    assert counted or name not in METHODS


def test_completion_knows_choices_and_keys():
    assert assignments("steer", [], "method=svdd_") == ["method=svdd_exact", "method=svdd_mc", "method=svdd_r"]
    assert assignments("steer", ["method=smc"], "method.part") == ["method.particles="]
    assert assignments("steer", ["method=smc"], "value@") == ["value@method.value="]
    assert assignments("steer", ["method=smc"], "value@method.value=l") == [
        "value@method.value=learned",
        "value@method.value=likelihood",
    ]
    assert assignments("tfbind8_svdd", [], "methods.svdd.opt")[0] == "methods.svdd.options.candidates="
    assert assignments("quickstart", [], "resume=t") == ["resume=true"]
    assert "seed=" in assignments("quickstart", []) and assignments("no_recipe", []) == []
    keys = assignments("steer", [])
    assert not [key for key in keys if "defaults" in key or "_target_" in key]
    recipe.compose("steer", [f"{key}1" for key in keys if key in ("seed=", "samples=", "method.temperature=")])


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("rgdiff ex", {"explain"}),
        ("rgdiff run quick", {"quickstart"}),
        ("rgdiff explain comman", {"commands"}),
        ("rgdiff run steer method=svdd method.temp", {"method.temperature="}),
        ("rgdiff show steer reward=sym", {"reward=symmetry"}),
    ],
)
def test_a_shell_completes(line, expected, tmp_path):
    pytest.importorskip("argcomplete")
    said = tmp_path / "said"
    asked = {"_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line)), "_ARGCOMPLETE_IFS": "\n"}
    asked |= {"_ARGCOMPLETE_STDOUT_FILENAME": str(said), "_ARGCOMPLETE_COMP_WORDBREAKS": " \t\n"}
    subprocess.run([sys.executable, "-m", "rgdiff"], env=os.environ | asked, capture_output=True, check=False)
    assert {one.strip() for one in said.read_text().split("\n") if one} == expected
