// Guesses at the next tokens.
#include "draft.h"

#include <doctest/doctest.h>

#include <vector>

using namespace bitnet;

TEST_CASE("what came before comes again") {
  using Tokens = std::vector<TokenId>;
  CHECK(Drafter(4).propose(Tokens{1, 2, 3, 4, 5, 6, 7, 1, 2, 3}, 9) == Tokens{4, 5, 6, 7});
  CHECK(Drafter(4).propose(Tokens{1, 2, 3, 4, 1, 2, 3, 5, 1, 2, 3}, 2) == Tokens{5, 1});  // the latest place
  CHECK(Drafter(4).propose(Tokens{1, 2, 3, 4, 5}, 9).empty());
  // Past the end of the text it goes on in the circle that it is in.
  CHECK(Drafter(7).propose(Tokens{9, 1, 2, 3, 1, 2, 3}, 9) == Tokens{1, 2, 3, 1, 2, 3, 1});
  CHECK(Drafter(5).propose(Tokens{8, 8, 8, 8}, 9) == Tokens{8, 8, 8, 8, 8});
}
