//! The command line of the simulator; see [`igsim::cli`].

use std::process::ExitCode;

fn main() -> ExitCode {
    igsim::cli::main()
}
