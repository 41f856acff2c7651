"""Writing a trained student in the formats that users load: NVlabs' torch.hub checkpoint, transformers' RadioModel, ONNX."""
