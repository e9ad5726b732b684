"""What `fedtrust new` writes. Each template works as it stands and says what to change."""

from __future__ import annotations

BEHAVIOUR = '''"""A client that attacks: {name}."""

from fedtrust.client import Behaviour, behaviour


@behaviour("{name}", knowledge="own", paper="")
class {title}(Behaviour):
    """Send the honest update turned round. (Replace this line: `fedtrust describe` and the report show it.)

    Override one hook, or several: `poison` (the data), `loss` (what is minimised), `craft` (what is sent), `reply` (the message).
    `knowledge` above is the least it needs: own, coalition, omniscient or omniscient+defence; `view` holds what the scenario grants.
    """

    scale: float = 4.0  # annotated fields are the parameters that a scenario may set

    def craft(self, updates, view):
        """Return what the coalition sends [k, d], from the updates that training gave [k, d]."""
        return -self.scale * updates
'''

AGGREGATOR = '''"""A defence: {name}."""

from fedtrust.server import Verdict, aggregator


@aggregator("{name}", paper="")
def {function}(updates, ctx, *, scale: float = 1.0):
    """Clip each update to `scale` times the median norm, then average. (Replace this line: `fedtrust describe` shows it.)

    `ctx` holds what a server may know, `ctx.assumed_malicious` included; never who attacks. Keyword-only arguments are the parameters
    that a scenario may set.
    """
    norms = updates.norm(dim=1, keepdim=True).clamp(min=1e-12)  # [n, 1]
    factor = (scale * norms.median() / norms).clamp(max=1)  # [n, 1]
    return Verdict((factor * updates).mean(0), trust=factor.squeeze(1))
'''

_COMMON = """
[data]
source = "mnist5k"                                  # fedtrust list source
partition = {{ kind = "dirichlet", alpha = 0.5 }}     # fedtrust list partition

[model]
name = "cnn"

[clients]
count = 20
train = {{ optimiser = "sgd", lr = 0.05, momentum = 0.9, batch_size = 20, epochs = 1 }}
"""

ATTACK_SCENARIO = (
    """title = "{name} against three defences"
rounds = 8
seed = 7
"""
    + _COMMON
    + """
[strategy]
assumed_malicious = 0.2                             # what the defender believes

[sweep]
strategies = ["mean", "median", "multi-krum"]       # fedtrust list aggregator

[sweep.attackers]
none = []
"{name}" = [{{ behaviour = "{module}:{name}", share = 0.2, params = {{ scale = 4.0 }} }}]
"""
)

DEFENCE_SCENARIO = (
    """title = "{name} against two attacks, beside the mean"
rounds = 8
seed = 7
"""
    + _COMMON
    + """
[strategy]
assumed_malicious = 0.2                             # what the defender believes

[sweep.strategies]
mean = "mean"
"{name}" = {{ aggregator = {{ name = "{module}:{name}", scale = 1.0 }} }}

[sweep.attackers]                                   # fedtrust list behaviour
none = []
"sign flip" = [{{ behaviour = "sign-flip", share = 0.2 }}]
"label flip" = [{{ behaviour = "label-flip", share = 0.2 }}]
"""
)

SCENARIO = (
    """title = "{name}"
rounds = 10
seed = 7
"""
    + _COMMON
    + """
[[attackers]]
behaviour = "label-flip"                            # fedtrust list behaviour
share = 0.2                                         # or count = 4, or ids = [0, 3]

[strategy]
assumed_malicious = 0.2                             # what the defender believes, not the truth
aggregator = "multi-krum"                           # fedtrust list aggregator

[[probes]]
name = "accuracy"

[[probes]]
name = "attack-success"

[[probes]]
name = "detection"
"""
)
