from hypothesis import settings
from tests.tiers.test_disk_model import DiskMachine
TestLong = DiskMachine.TestCase
TestLong.settings = settings(max_examples=800, stateful_step_count=60, deadline=None, print_blob=True)
