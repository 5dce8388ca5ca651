pub(super) fn up(_: super::UpArgs) -> Result<(), super::Failure> {
    Err(super::Failure::run("not yet"))
}
