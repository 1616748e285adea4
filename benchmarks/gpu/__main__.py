import sys

from benchmarks.gpu.check import main

sys.exit(main())
