-- The rows of the training table: one per rating of the first published fold of MovieLens 100K,
-- u1.base to learn from and u1.test to test on, with what is known of user and movie.
-- A tenth of u1.base, spread over users and movies, is for the choice of the best model.
WITH ratings AS (
  SELECT *, CASE WHEN (user_id + item_id) % 10 = 0 THEN 'valid' ELSE 'train' END AS split FROM base
  UNION ALL BY NAME
  SELECT *, 'test' AS split FROM held_out
)
SELECT
  ratings.split,
  ratings.user_id,
  -- Titles are not unique, numbers are.
  format('{} ({})', movies.title, ratings.item_id) AS movie,
  users.age,
  users.sex,
  users.occupation,
  try_cast(regexp_extract(movies.title, '\((\d{4})\)', 1) AS BIGINT) AS movie_year,
  movies.action,
  movies.childrens,
  movies.comedy,
  movies.drama,
  movies.horror,
  movies.romance,
  movies.sci_fi,
  movies.thriller,
  ratings.rating
FROM ratings
LEFT JOIN users ON users.user_id = ratings.user_id
LEFT JOIN movies ON movies.item_id = ratings.item_id
