"""How good is it: recall of proposals, and grounding of referring expressions."""
