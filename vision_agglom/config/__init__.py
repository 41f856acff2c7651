"""What a distillation run is: typed, frozen, one documented field per option."""
