"""From an adapter to what is deployed: merged models, LoRA out of any method, files of other programs; each proven."""

from deltatune.ship.convert import convert_adapter as convert_adapter
from deltatune.ship.export import export_adapter as export_adapter
from deltatune.ship.merge import merge_to_folder as merge_to_folder
from deltatune.ship.proof import Proof as Proof
from deltatune.ship.proof import Tolerance as Tolerance
