"""The guest in this process."""

from lguestlib.runtime.inprocess.machine import InprocessMachine
from lguestlib.runtime.inprocess.shell import shell
from lguestlib.runtime.launch.limits import check_bus, check_memory
from lguestlib.runtime.launch.plan import Plan, closed_on_error
from lguestlib.runtime.mmio_machine import DEVICES_AT, DEVICES_MAX
from lguestlib.runtime.options import MachineOptions


def check(options: MachineOptions) -> None:
    check_memory(options.memory, DEVICES_AT)
    check_bus(len(options.devices), DEVICES_MAX)


def build(plan: Plan) -> InprocessMachine:
    with closed_on_error(plan.memory()) as memory:
        machine = InprocessMachine(memory, shell(" ".join(plan.words)), plan.say, plan.tracer)
    with closed_on_error(machine):
        plan.add_devices(machine.add)
    return machine
