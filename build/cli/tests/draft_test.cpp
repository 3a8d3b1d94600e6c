// Guesses at the next tokens.
#include "draft.h"

#include <doctest/doctest.h>

#include <vector>

using namespace bitnet;

TEST_CASE("what came before comes again") {
  using Tokens = std::vector<TokenId>;
  CHECK(Drafter(4).propose(Tokens{1, 2, 3, 4, 5, 6, 7, 1, 2, 3}, 9) == Tokens{4, 5});  // few at first
  CHECK(Drafter(4).propose(Tokens{1, 2, 3, 4, 5, 6, 7, 1, 2, 3}, 1) == Tokens{4});
  CHECK(Drafter(4).propose(Tokens{1, 2, 3, 4, 1, 2, 3, 5, 1, 2, 3}, 9) == Tokens{5, 1});  // the latest place
  CHECK(Drafter(4).propose(Tokens{1, 2, 3, 4, 5}, 9).empty());
  CHECK(Drafter(0).propose(Tokens{8, 8, 8, 8}, 9).empty());
}

TEST_CASE("right guesses make longer ones, wrong guesses shorter ones") {
  using Tokens = std::vector<TokenId>;
  const Tokens text{9, 1, 2, 3, 1, 2, 3};
  Drafter drafter(7);
  drafter.learn(2, 2);
  CHECK(drafter.propose(text, 9) == Tokens{1, 2, 3, 1});  // past the text's end in the circle that it is in
  drafter.learn(4, 4);
  CHECK(drafter.propose(text, 9) == Tokens{1, 2, 3, 1, 2, 3, 1});
  drafter.learn(7, 1);
  CHECK(drafter.propose(text, 9) == Tokens{1, 2});
  drafter.learn(2, 0);
  CHECK(drafter.propose(text, 9) == Tokens{1});
}

TEST_CASE("guesses stop when they have cost a fiftieth of the time, and go on where they pay") {
  GuessBudget budget;
  CHECK(!budget.allows(1));  // nothing is known yet to compare it with
  budget.weigh(1.0, 1, 0, 0);
  CHECK(!budget.allows(2));
  size_t n_guesses = 0;
  for (size_t i = 0; i < 10000; i++) {  // wrong ones that take as long as a token
    const bool guess = budget.allows(1);
    n_guesses += guess;
    budget.weigh(guess ? 2.0 : 1.0, 1, guess, 0);
  }
  CHECK(n_guesses > 150);
  CHECK(n_guesses < 250);
  for (size_t i = 0; i < 100; i++) budget.weigh(1.5, 1, 3, 3);
  for (n_guesses = 0; budget.allows(1); n_guesses++) budget.weigh(2.0, 1, 1, 0);
  CHECK(n_guesses <= 5);  // what was gained long ago counts little
}
