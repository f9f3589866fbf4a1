"""How much a model's answers move when its pictures are changed invisibly: attacks, losses, measures, reports.

Attacks maximise a function of pixels in 0..1 inside a ball around a clean picture. `balls` knows the balls, `losses`
what is maximised, `pgd`, `apgd` and `autoattack` how, `pixels` how pixels reach an encoder, `model_attack` how they
reach a whole model's loss, `ensemble` in which order published evaluations attack, `run` measures a task.

The attacks here run on models whose weights the user holds; nothing in this package calls a service.
"""
