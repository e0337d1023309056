"""What other people's libraries give for a checkpoint, one file for each kind of model.

They are imported only here and only when asked for: neither building nor serving needs them, or torch. References
compute in FP32 whatever the checkpoint was saved in.
"""
