"""What messages about recipes and command lines say, and whom they blame."""

import json

import pytest

from dpt.config.checks import batch_split
from dpt.config.command import parse_command
from dpt.config.json_text import parse_object
from dpt.config.recipe import load_recipe
from dpt.errors import UserError


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "r.json"
    path.write_text(json.dumps({"train_batch_size": 8, "dpt": {"training": {"steps": 4}}}))
    return path


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"training.steps": "many"}, "the command line: dpt.training.steps is 'many'; it must be a whole number."),
        ({"dpt.training.steps": "many"}, "the command line: dpt.training.steps is 'many'; it must be a whole number."),
        (
            {"task": "dept"},
            'the command line: dpt.task is "dept"; choose one of class, depth, flow, amodal, generalist, or name',
        ),
        ({"training.stepz": "4"}, 'the command line: there is no field "training.stepz"; did you mean "steps"?'),
        ({"data.shards": "1"}, ""),
        (
            {"tracking.registered_model": "lab/depth"},
            'the command line: dpt.tracking.registered_model is "lab/depth"; names in MLflow\'s registry',
        ),
        ({"tracking.enabled": "perhaps"}, "the command line: dpt.tracking.enabled is 'perhaps'; it must be true or false."),
        (
            {"training.ema_decays": '["a"]'},
            "the command line: dpt.training.ema_decays is ['a']; it must be a list, each a",
        ),
    ],
)
def test_the_command_line_is_blamed_for_its_own_mistakes(recipe, overrides, said):
    if not said:
        assert load_recipe(recipe, overrides).overridden == {"data.shards"}
        return
    with pytest.raises(UserError) as caught:
        load_recipe(recipe, overrides)
    assert str(caught.value).startswith(said)


def test_the_file_is_blamed_for_its_own(recipe):
    recipe.write_text(json.dumps({"train_batch_size": 8, "dpt": {"training": {"steps": "many"}}}))
    with pytest.raises(UserError, match=r"r\.json: dpt\.training\.steps is 'many'; it must be a whole number"):
        load_recipe(recipe, {"training.seed": 1})


def test_sentences_of_later_checks_say_where_a_field_was_set(recipe):
    """Those that begin with a field; what names a file or a folder stays as it is."""
    loaded = load_recipe(recipe, {"training.seed": "1"})
    for sentence, said in {
        "dpt.training.steps is too many.": f"{recipe}: dpt.training.steps is too many.",
        "dpt.training.seed is odd.": "the command line: dpt.training.seed is odd.",
        "optimizer.params.lr is high.": f"{recipe}: optimizer.params.lr is high.",
        "some/folder: there is no such folder.": "some/folder: there is no such folder.",
    }.items():
        with pytest.raises(UserError) as caught, loaded.blamed():
            raise UserError(sentence)
        assert str(caught.value) == said


def test_impossible_batches_name_what_was_set(recipe):
    with pytest.raises(UserError, match=r"^the command line: train_batch_size is 0; it must be a whole number"):
        batch_split(load_recipe(recipe, {"train_batch_size": "0"}), 1)
    with pytest.raises(UserError, match=r"r\.json: train_batch_size 8 is not a multiple of 3 ranks; change"):
        batch_split(load_recipe(recipe), 3)


def test_no_recipe_at_all_is_said():
    recipe = parse_command("pretrain", "", "training", ["--steps", "3"])
    with pytest.raises(
        UserError, match=r"^no recipe is named: train_batch_size is missing; give a recipe with --ds_config FILE"
    ):
        batch_split(recipe, 1)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{\n "a": 1\n "b": 2\n}', "a comma or a closing bracket is missing after line 2, column 7"),
        ('{\n "a": 1,\n}\n', "there is a comma too many at line 2, column 8"),
        ('{\n "a": [1, 2,\n ]\n}', "there is a comma too many at line 2, column 12"),
        ('{\n "a": 1\n', "it ends too early, after line 2, column 7"),
        ("", "the file is empty"),
        ("{\n 'a': 1}", "a name in double quotes is expected at line 2, column 2"),
        ('{"a": yes}', "a value is expected at line 1, column 7"),
    ],
)
def test_broken_json_is_shown_where_the_mistake_is(text, said):
    with pytest.raises(UserError) as caught:
        parse_object(text, "x.json", "a recipe")
    assert str(caught.value) == f"x.json: not valid JSON: {said}."
