"""`fuse_on="step"`: the model stays dense, and its experts are optimizer state.

Note [Where the experts are]
A wrapped linear keeps its class, and its weight and bias stay the parameters that they were. `wrap`
writes the start value `W = sum_i w_i E_i` into them and attaches the group's fusion weights, a
small module, to the FFN. The expert stacks are in `optimizer.state[p]["experts"]`, shape (N, *S),
beside the states of the experts ("experts.exp_avg" and so on). They are drawn at the first step of
the optimizer, or come with its loaded state, and are sharded as the parameter is.

Note [A step]
With `G = dL/dW`, the gradient of expert i is `w_i G` and that of its fusion weight `<E_i, G>`. So
forward and backward are the dense model's, and the rest happens in an optimizer's step (hooks.py,
expert_step.py):

1. What was written to `W` since the last step is added to the experts (writes.py).
2. Routers and learned fusion weights get their gradients, after one all-reduce for all groups
   (fusion_gradients.py).
3. The optimizer steps on everything but the wrapped parameters.
4. The memory banks move.
5. Each expert is updated as a parameter of its own (torch_optimizers.py), or all of them in one
   pass over the stack (ExpertAdamW and ExpertSGD: adamw_and_sgd.py; what they share:
   one_pass.py, stack_step.py, state_storage.py).
6. `W = sum_i w_i E_i` with the new fusion weights.

A step that fails before experts move leaves everything as it was, and a later Ctrl-C waits for its
end. A step that fails among the experts, say without memory, cannot be undone without a copy of all
experts and states, which no step makes. The optimizer's next step, `fuse` and `fused_state_dict`
then raise, and its `state_dict` warns, until it loads a state.

Static and learned fusion weights train as under "forward". A memory bank fuses with the bank of the
step before, and its router sends no gradient into the FFN's input.

Note [The other files]

- A fused weight or bias: `fused_parameter`. What an optimizer has for it: `slots`. The optimizer
  without these parameters: `view`. The state that it has from before there were experts:
  `dense_states`. Attaching all this to a model and taking it off again: `attach`.
- Errors: `refusals` before every step, under both settings of `fuse_on`; `starts` where experts
  start; `first_step_checks` at an optimizer's first step under "forward".
- `custom_loops` refuses engines whose optimizer holds copies of the weights, and warns of loops
  without an optimizer; `health` checks fusion weights after each step. Both under both settings.
- `interrupts` holds Ctrl-C back until the step is done.
"""
