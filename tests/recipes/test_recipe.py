from rlrag.config import Stage as Settings
from rlrag.data.task import open_task
from rlrag.recipes.recipe import Recipe, Stage
from rlrag.recipes.search_grpo import build
from tests.experiments import tiny


def test_a_recipe_is_a_value_that_another_is_made_from():
    recipe = build(tiny(), open_task(tiny()))[0].recipe
    other = recipe._replace(rewards=("answer", "length"))
    assert other != recipe
    assert recipe.rewards == ("answer",)
    assert other._replace(rewards=("answer",)) == recipe
    assert dict(recipe.tools) == {}, "a recipe without tools names none"


def test_a_stage_plays_the_policy_unless_it_demonstrates():
    recipe = Recipe(lambda example, mode: iter(()), {}, lambda group: [], (), None, {})  # type: ignore[arg-type]
    assert Stage("main", recipe, Settings(), 3).demonstrate is None
