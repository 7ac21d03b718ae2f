// What libstdc++ exports only in newer versions and the compiler or torch's headers use, defined here, so that the
// wheel loads where it is older: the default constructors of the string streams are there since GCC 9 (GLIBCXX_3.4.26),
// what a vector of too many elements throws by since GCC 11 (GLIBCXX_3.4.29).
#include <new>
#include <sstream>

template std::basic_ostringstream<char>::basic_ostringstream();
template std::basic_stringstream<char>::basic_stringstream();

namespace std {
void __throw_bad_array_new_length() { throw bad_array_new_length(); }
}  // namespace std
