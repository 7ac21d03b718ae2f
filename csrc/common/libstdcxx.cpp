// libstdc++ exports the default constructors of the string streams only since GCC 9 (GLIBCXX_3.4.26). torch's headers
// use them, so they are defined here, and the wheel loads where libstdc++ is older.
#include <sstream>

template std::basic_ostringstream<char>::basic_ostringstream();
template std::basic_stringstream<char>::basic_stringstream();
