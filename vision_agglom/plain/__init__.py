"""The student and its heads in plain torch, under the parameter names of NVlabs' RADIO checkpoints: their specification and reader."""
