"""Settings files to begin with: `recipe("classification", "lora")`; and what may stand in one: `settings_schema()`."""

from deltatune.recipes.schema import settings_schema as settings_schema
from deltatune.recipes.write import TASKS as TASKS
from deltatune.recipes.write import recipe as recipe
