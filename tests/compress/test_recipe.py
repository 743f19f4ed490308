from dataclasses import replace

import pytest

from whet.compress.recipe import Data, Distillation, Pruning, Recipe, Training, parse_value

RECIPE = Recipe(
    model='folder "with" \\ and ü',
    task="sequence_classification",
    teacher="t",
    seed=3,
    data=Data(train=("a.csv", "b.csv"), columns={"label": "intent"}, max_length=32),
    pruning=Pruning(method="magnitude", sparsity=0.75, block="8x4", updates=10),
    distillation=Distillation(labels=0.5, temperature=3.0),
    training=Training(steps=100, learning_rate=1e-05, embeddings=True),
)


def test_recipes_survive_the_file(tmp_path):
    path = tmp_path / "r.toml"
    path.write_text(RECIPE.to_toml(), encoding="utf-8")
    assert Recipe.read(path) == RECIPE
    assert Recipe.from_table(RECIPE.to_table()) == RECIPE


def test_a_recipe_names_what_differs_from_the_defaults(tmp_path):
    path = tmp_path / "r.toml"
    path.write_text('version = 1\nmodel = "m"\ntask = "embedding"\n[training]\nlearning_rate = 1\n', encoding="utf-8")
    assert Recipe.read(path) == Recipe(model="m", task="embedding", training=Training(learning_rate=1.0))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "version is None"),
        ("version = 2", "version is 2; this Whet reads recipes of version 1"),
        ("version = 1", "model is missing"),
        ('version = 1\nmodel = "m"\ntask = "x"', "task is 'x'; expected one of embedding"),
        ('version = 1\nmodel = 3\ntask = "embedding"', "model is 3; expected a str"),
        ('version = 1\nmodel = "m"\ntask = "embedding"\nseeds = 1', "seeds is no field of a recipe"),
        ('version = 1\nmodel = "m"\ntask = "embedding"\n[training]\nstep = 1', "training.step is no field"),
        ('version = 1\nmodel = "m"\ntask = "embedding"\n[data]\ntrain = "a"', "data.train is 'a'; expected a list"),
        ('version = 1\nmodel = "m"\ntask = "embedding"\npruning = 1', "pruning is 1; expected a table"),
        ("version = ", "is not TOML"),
    ],
)
def test_bad_files_say_which_field(tmp_path, text, message):
    path = tmp_path / "r.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        Recipe.read(path)


@pytest.mark.parametrize(
    ("part", "values", "message"),
    [
        ("pruning", {"sparsity": 1.0}, "pruning.sparsity is 1.0"),
        ("pruning", {"block": "3x4"}, "block is '3x4'"),
        ("pruning", {"method": "luck"}, "pruning.method is 'luck'"),
        ("pruning", {"method": "reconstruct", "budget": "global"}, "use 'layer' or 'latency'"),
        ("training", {"batch": 0}, "training.batch is 0"),
        ("training", {"warmup": 1.0}, "training.warmup is 1.0"),
        ("distillation", {"states": -1.0}, "distillation.states is -1.0"),
        ("data", {"max_length": 4}, "data.max_length is 4"),
    ],
)
def test_values_out_of_range_are_refused(part, values, message):
    with pytest.raises(ValueError, match=message):
        replace(RECIPE, **{part: replace(getattr(RECIPE, part), **values)})


def test_what_makes_no_sense_together_is_refused():
    with pytest.raises(ValueError, match="neither a teacher nor a weight for labels"):
        replace(RECIPE, teacher="", distillation=Distillation())
    with pytest.raises(ValueError, match="without labels"):
        replace(RECIPE, task="embedding")
    with pytest.raises(ValueError, match="every weight of distillation is 0"):
        replace(RECIPE, distillation=Distillation(outputs=0, states=0))
    unlabelled = Data(train=("a.csv",), unlabelled=("b.txt",))
    for changes in ({"teacher": ""}, {"distillation": Distillation(labels=1, outputs=0, states=0)}):
        with pytest.raises(ValueError, match="no teacher, or no weight of distillation, to learn its answers with"):
            replace(RECIPE, data=unlabelled, **changes)
    with pytest.raises(ValueError, match=r"name all texts in data\.train"):
        replace(RECIPE, task="embedding", distillation=Distillation(), data=unlabelled)
    with pytest.raises(ValueError, match="needs gradients"):
        replace(RECIPE, pruning=Pruning(method="movement"), training=Training(steps=0))


def test_values_are_read_as_toml_or_as_text():
    assert parse_value("3") == 3 and parse_value("true") is True and parse_value('["a"]') == ["a"]
    assert parse_value("8x4") == "8x4" and parse_value('"8x4"') == "8x4" and parse_value("a/b c") == "a/b c"
