"""The input seam: rows before the embedded tokens, which nobody outside of the model sees."""

INPUT = "_deltatune_input"  # key of the seam (`deltatune.inputs.stage:InputStage`) in the __dict__ of the model's root
