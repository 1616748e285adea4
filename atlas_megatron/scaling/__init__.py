"""One dial from 0.15M to 7B parameters, and what finished runs say of loss against compute."""
