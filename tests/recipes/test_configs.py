"""The configs' comments are true as far as they can be checked: every command and every key=value in them composes and checks."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

import pytest

from rgdiff.domains.images.rewards import symmetry
from rgdiff.recipes import compose as recipe
from rgdiff.recipes import manual, plan
from rgdiff.recipes.run import run_recipe
from rgdiff.recipes.sweep import expand
from rgdiff.rewards import Task

FOLDER = recipe.config_dir()
PAIR = r"[a-z_0-9+@]+(?:\.[a-z_0-9@]+)*=[^\s;,)]+"  # key=value
COMMAND = re.compile(rf"rgdiff run ([a-z_0-9]+)((?:\s+{PAIR})*)")
NEEDS = {"tfbind8": "SIX6_REF_R1_8mers.txt", "utr": "snv_phenotype_log_diff.csv", "gfp": "avgfp.tsv"} | {
    "mnist": "mnist-t10k-images-idx3-ubyte.gz", "subspace": "ggdm_linear_hyperparameters.npz",
    "qm9": "gdss_qm9.npz", "zinc250k": "gdss_zinc250k_v2.npz",
    "sphere": "ggdm_ball_hyperparameters.npz", "gb1": "full_landscape.csv", "aav": "full_data.csv",
}  # fmt: skip
PACKAGES = {"smiles": "rdkit", "rna": "RNA"}  # that a domain is built with


def comments(path):
    """The words of a file's comments, as one line."""
    return " ".join(line.partition("#")[2].strip() for line in path.read_text(encoding="utf-8").splitlines())


def commands():
    """Every command in a comment of a recipe: (recipe, overrides)."""
    for name in recipe.names():
        for found, overrides in COMMAND.findall(comments(FOLDER / f"{name}.yaml")):
            yield found, tuple(o for o in overrides.split() if o != "data_dir=DIR")


def test_every_recipe_says_how_it_is_run_and_names_no_key_outside_of_a_command():
    for name in recipe.names():
        text = comments(FOLDER / f"{name}.yaml")
        assert name in [found for found, _ in COMMAND.findall(text)], name
        rest = COMMAND.sub("", text)
        pairs = [pair for pair in re.findall(PAIR, rest) if pair.partition("=")[0] in recipe.GROUPS or "." in pair]
        for pair in pairs:  # mentioned in passing: of this recipe or of any
            key, _, value = pair.partition("=")
            assert key in recipe.GROUPS and value in recipe.names(key), (name, pair)


def checked(name, overrides):
    """Compose a command and check it as far as no data is needed."""
    config, chosen = recipe.composed(name, overrides)
    recipe.check_common(config, name)
    recipe.check(config, recipe.trusted_modules(overrides))
    assert recipe.methods_of(config, chosen)
    return chosen


def test_every_command_of_the_readme_and_the_docs_composes():
    """Those of the command line; my_module stands for a user's."""
    root = Path(__file__).resolve().parents[2]
    pages = [root / "README.md", *sorted((root / "rgdiff" / "docs").glob("*.md"))]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages).replace(
        "my_module", "tests.recipes.user_module"
    )
    found = [shlex.split(line, comments=True) for line in re.findall(r"^    .*?rgdiff run (.*)$", text, re.M)]
    assert len(found) > 12
    for name, *rest in found:
        overrides = [part for part in rest if not part.startswith("--")]
        for one in expand(overrides) if "--multirun" in rest else [overrides]:
            checked(name, one)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "overrides"), sorted(set(commands())), ids=str)
def test_every_command_of_a_comment_would_run(name, overrides, tmp_path):
    domain = checked(name, overrides)["domain"]
    needed = NEEDS.get(domain)
    if needed and not os.path.isfile(os.path.join(os.environ.get("RGDIFF_DATA", ""), needed)):
        pytest.skip(f"composed and checked; building needs {needed} in RGDIFF_DATA")
    if any("/models/" in override for override in overrides):
        pytest.skip("composed and checked; building needs released weights, which are the reader's own")
    if any(part in override for override in overrides for part in ("=FILE", "=COLUMN")):
        pytest.skip("composed and checked; building needs the reader's own file")
    if domain in PACKAGES:
        pytest.importorskip(PACKAGES[domain])
    if "domain.language=selfies" in overrides:
        pytest.importorskip("selfies")
    run_recipe(name, [*overrides, f"out={tmp_path / 'run'}"], dry=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_choices_of_groups_name_keys_and_choices_that_there_are():
    for group in recipe.GROUPS:
        for path in (FOLDER / group).glob("*.yaml"):
            for run in re.findall(rf"{PAIR}(?: {PAIR})*", comments(path)):
                pairs = [pair.rstrip(".:") for pair in run.split()]
                mine = [o for o in pairs if not re.search("my_module|FILE|FOLDER", o)]
                itself = (
                    [] if path.stem.startswith("_") or group in ("surrogate", "value") else [f"{group}={path.stem}"]
                )
                given = [o.partition("=")[0] for o in mine]
                recipe.compose("steer", [*(o for o in itself if group not in given), *own(path, itself), *mine])


def own(path, itself):
    """What a choice of the user's own parts needs to compose."""
    return {
        ("domain", "custom"): ["domain.fn=tests.user_module.load"],
        ("prior", "custom"): ["prior.network._target_=tests.user_module.Net"],
        ("reward", "custom"): ["reward.fn=tests.user_module.score"],
        ("reward", "smiles"): ["reward.fn=tests.user_module.score"],
        ("reward", "similarity"): ["reward.reference=CCO"],
        ("reward", "substructure"): ["reward.reference=CCO"],
        ("reward", "backbone"): ["reward.pdb=/file"],
        ("domain", "pictures"): ["domain.path=/files"],
    }.get((path.parent.name, path.stem) if itself else ("", ""), [])


def test_every_recipe_has_a_prior_and_a_reward_that_its_domain_names():
    for domain in recipe.names("domain"):
        told = recipe.header(domain, "domain")
        for group in ("prior", "reward"):
            assert set(told[f"{group}s"].split(", ")) <= set(recipe.names(group)), (domain, group)
    for name in recipe.names():
        told = recipe.header(manual.chosen(name)["domain"], "domain")
        for group in ("prior", "reward"):
            assert manual.chosen(name)[group] in told[f"{group}s"].split(", "), (name, group)


WITHOUT_DATA = {"anomaly", "curve", "digits", "mixture", "mnist16", "planar"}


@pytest.mark.first(1)
@pytest.mark.parametrize("domain", sorted(WITHOUT_DATA))
def test_the_priors_that_a_domain_names_fit_it(domain):
    built = recipe.build(recipe.compose("steer", [f"domain={domain}"])["domain"])
    for prior in recipe.header(domain, "domain")["priors"].split(", "):
        recipe.build(recipe.compose("steer", [f"domain={domain}", f"prior={prior}"])["prior"]).check(built)


def test_another_domain_brings_a_prior_and_a_reward_that_fit():
    took = lambda *overrides: recipe.composed("steer", overrides)[1]  # noqa: E731
    assert (took("domain=planar")["prior"], took("domain=planar")["reward"]) == ("planar_mlp", "direction")
    assert (took("domain=planar", "prior=mlp")["prior"], took()["prior"]) == ("mlp", "unet")  # what is said is taken
    assert took("domain=mnist")["prior"] == "unet" and took("domain=mnist", "reward=ink")["reward"] == "ink"
    assert recipe.composed("digits_conditional", ["domain=mnist"])[1]["prior"] == "unet_conditional"  # it fits
    assert any("planar_mlp" in path.name for path, _ in recipe.sources("steer", ["domain=planar"]))


def test_a_chain_is_tuned_on_as_many_calls_as_are_asked_for():
    for calls, expected in (("null", 15), (4, 4)):
        config = recipe.compose("quickstart", [f"methods.draft.calls={calls}"])
        domain, prior, method = (recipe.build(config[key]) for key in ("domain", "prior", "methods"))
        built = plan.parts(method["draft"], plan.stand_in(prior, domain.shape), Task(symmetry(), symmetry()))
        assert built["tuner"].network_calls() == expected
    with pytest.raises(ValueError, match="calls"):
        recipe.build(recipe.compose("quickstart", ["methods.draft.calls=0"])["methods"])["draft"].check(
            prior, domain.shape
        )
