"""``lbzoo schema``: for editors."""

from __future__ import annotations


def schema() -> None:
    """Print the JSON schema of recipe files; editors complete and check YAML with it.

    First line of a recipe:  # yaml-language-server: $schema=recipe.schema.json
    """
    from lbzoo.cli.printing import print_json
    from lbzoo.recipe.json_schema import recipe_schema

    print_json(recipe_schema())
