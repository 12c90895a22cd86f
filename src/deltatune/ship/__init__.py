"""From adapters to what is deployed: merged models, LoRA, several as one, files of other programs; each proven."""

from deltatune.ship.combine import Combined as Combined
from deltatune.ship.combine import combine_adapters as combine_adapters
from deltatune.ship.convert import convert_adapter as convert_adapter
from deltatune.ship.export import export_adapter as export_adapter
from deltatune.ship.merge import merge_to_folder as merge_to_folder
from deltatune.ship.proof import Proof as Proof
from deltatune.ship.proof import Tolerance as Tolerance
from deltatune.ship.recipe import Part as Part
from deltatune.ship.recipe import Recipe as Recipe
from deltatune.ship.recipe import read_recipe as read_recipe
