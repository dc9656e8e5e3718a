//! The cases, one file per kernel object kind.

use crate::guest::case::Entry;

mod pipe;

/// Every case, in the order they run in.
pub fn all() -> impl Iterator<Item = &'static Entry> {
    [pipe::CASES].into_iter().flatten()
}

/// The case of this name.
pub fn find(name: &str) -> Option<&'static Entry> {
    all().find(|entry| entry.name == name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique() {
        let mut names: Vec<_> = all().map(|entry| entry.name).collect();
        let count = names.len();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), count);
    }
}
