//! Exit codes: a stable contract with scripts (DESIGN.md section 5).

/// How a `tracker` command ended. Errors of every operation map to one of these.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum ExitCode {
    /// Done.
    Done = 0,
    /// The audit found a difference, or the application failed.
    Difference = 1,
    /// The command line was wrong.
    Usage = 2,
    /// An object of the application cannot be carried; nothing was touched.
    NotEligible = 3,
    /// The kernel lacks a feature or a capability is missing.
    Unsupported = 4,
    /// The image is damaged, incomplete or of another architecture or format.
    ImageInvalid = 5,
    /// Something failed before the point of no return; the applications run on.
    RolledBack = 6,
    /// The application could not be restored; the image is kept.
    RestoreFailed = 7,
}

/// Implemented by the error of every command.
pub trait HasExitCode {
    /// The code the process ends with.
    fn exit_code(&self) -> ExitCode;
}
