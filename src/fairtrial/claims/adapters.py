"""Models with the low-rank adapters that methods are compared with; `peft` makes them."""

from torch import nn

from fairtrial.methods.optimizers.galore import galore_param_groups


def with_adapters(model: nn.Module, r: int, *, dora: bool = False, train_the_rest: bool = False) -> nn.Module:
    """The model with an adapter on every linear layer but the last, which is trained in full.

    Args:
        model: gets its adapters in place.
        r: their rank; their scale is 2, as with alpha = 2 r.
        dora: split directions and lengths, as DoRA does.
        train_the_rest: train all else as well but the matrices that have adapters, as in training from scratch.
    """
    from peft import LoraConfig, get_peft_model

    chosen = {id(p) for group in galore_param_groups(model) if "rank" not in group for p in group["params"]}
    linears = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    targets = [name for name, module in linears if id(module.weight) in chosen]
    last = linears[-1][1]
    rest = [p for p in model.parameters() if id(p) not in chosen] if train_the_rest else list(last.parameters())
    adapted: nn.Module = get_peft_model(model, LoraConfig(r=r, lora_alpha=2 * r, target_modules=targets, use_dora=dora))
    for p in rest:
        p.requires_grad_()
    return adapted
